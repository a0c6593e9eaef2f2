"""What users do not import. Floors and names may change with any release."""
