"""The verbs of segjobs: Ray and object storage around `segmodel`; no model mathematics."""
