"""Hardware, hashes, atomic writes, special token ids, and what differs between versions of transformers. Imports: errors."""
