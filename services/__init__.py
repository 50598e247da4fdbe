"""The processes of a run; they never import each other."""
