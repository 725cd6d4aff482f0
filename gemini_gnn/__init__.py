"""gemini_gnn: distributed GNN training that does not stop when machines fail."""
