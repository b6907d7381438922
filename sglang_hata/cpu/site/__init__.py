"""Put first on PYTHONPATH by `hata-cpu`, and by nothing else."""
