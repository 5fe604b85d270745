"""What a folder with a pretrained model holds: files, names, config.json, tokenizer, adapters."""
