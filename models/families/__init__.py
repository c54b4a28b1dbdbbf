"""Model families: what a Hugging Face config means as a DecoderSpec, and which checkpoint tensors make up each parameter."""
