"""An OpenAI-compatible server: continuous batching over packed caches, prefixes shared between requests."""
