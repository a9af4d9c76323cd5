"""Mixture-of-experts compression of KV caches."""
