"""Smaller vocabularies: choose tokens, rewrite the tokenizer, slice embedding and LM head, and count bytes of text."""
