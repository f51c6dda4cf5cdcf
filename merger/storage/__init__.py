"""Where bytes live: the safetensors format, reads and writes that pass the page cache, local model folders."""
