"""What a step does with its gradients: the optimizer and the average of the weights."""
