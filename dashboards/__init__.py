"""What people open, made from the catalogue."""
