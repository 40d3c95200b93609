"""The optimizer: AdamW's update rule (`adamw`)."""
