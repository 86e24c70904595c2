"""What one notebook asks of one method: what computes a study and what draws it stand together. Nothing imports it."""
