"""What is done with a trained model: predict, export, serve."""
