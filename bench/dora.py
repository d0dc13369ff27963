"""The row dora."""
