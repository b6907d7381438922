"""Whether answers change: tasks with known answers over long contexts, dense beside HATA."""
