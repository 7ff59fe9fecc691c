"""This project's networks inside other frameworks' programs. Nothing of llm_core imports this folder."""
