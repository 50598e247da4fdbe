"""The wire: messages and services, with the Python generated from them."""
