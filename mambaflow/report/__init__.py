"""What a person sees: tables, pictures, training curves."""
