"""What codes keep of the attention: by encoder, by training text, and on a fine-tuned model."""
