"""Everything about the small file: attach, read, write, convert."""
