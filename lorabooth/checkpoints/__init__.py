"""Weight files of base models and adapters as bytes: what is in them, where, and rewriting them."""
