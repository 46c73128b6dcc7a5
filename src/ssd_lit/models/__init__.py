"""GPT-2, BERT, T5 and LLaMA with their FFNs swapped; FLOPs; generation."""
