"""Loss and gradients on a CPU, and the matrix products behind them."""
