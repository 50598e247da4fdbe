"""The person's side: up, status, report, check, export."""
