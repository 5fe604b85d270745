"""The result in other forms: merged model, adapter, GGUF, upload to the hub."""
