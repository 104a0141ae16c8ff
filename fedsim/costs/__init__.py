"""FLOPs, memory and bytes on the air, from plain numbers."""
