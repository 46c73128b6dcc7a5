"""What a final model is worth: losses over k, experts, activation pattern, GLUE, BLiMP."""
