"""Text to blocks of tokens: sources, documents, tokenizer, encoding, objectives; files of GLUE and BLiMP."""
