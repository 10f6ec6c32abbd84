"""Loads and runs GGUF models on llama.cpp."""
