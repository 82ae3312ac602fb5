"""What tests share: the harness, the models, the replay, and the references."""
