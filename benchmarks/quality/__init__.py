"""Quality of compressed caches: how far answers move when pairs are evicted."""
