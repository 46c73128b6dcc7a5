"""Checkpoint folders of Hugging Face: MoEfy, open and export."""
