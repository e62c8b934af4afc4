"""Models whose blocks are remote: embeddings, sampling and text; or all of that on a generation server."""
