"""Ask questions of your documents: retrieve with FAISS, answer with SGLang, cite the sources."""
