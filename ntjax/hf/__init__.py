"""Hugging Face folders in and out, without torch.

hub           a name or path -> a folder
files         what a model folder may hold, and writing one so that it is never half there
shards        tensors of a safetensors checkpoint, and writing one
flax_msgpack  the same for flax_model.msgpack
gguf_file     a GGUF file as a Hugging Face model: tensors, config, tokenizer
folder        a checkpoint <-> the weights of a model
tokenizer     tokenizers and generation configs
"""
