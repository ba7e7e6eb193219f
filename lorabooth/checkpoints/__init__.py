"""Weight files of base models and adapters as streams of bytes: what is in them, where, and rewriting them."""
