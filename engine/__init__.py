"""The CoDE detector: preprocessing, encoder, heads, bundles, backends and batching."""
