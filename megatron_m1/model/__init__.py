"""The model: layers put together on megatron-core, and their first weights."""
