"""SignRound: codes moved by the sign of the gradient of a layer's output error, instead of by a formula for one linear."""
