"""State-space programs, their exact answers, and series to run them on.

`zoo.py` holds the programs, `kalman.py` and `hmm.py` the exact answers, `data.py` the series.
"""

from smcscale.models.statespace.data import Series, nile, sp500_returns
from smcscale.models.statespace.hmm import (
    FilteredStates,
    HiddenMarkov,
    SmoothedStates,
    hmm_filter,
    hmm_smoother,
    log_emissions,
)
from smcscale.models.statespace.kalman import (
    Filtered,
    LinearGaussian,
    Smoothed,
    autoregression_model,
    coupled_model,
    kalman_filter,
    kalman_smoother,
    local_level_model,
)
from smcscale.models.statespace.zoo import (
    bearings_only,
    hidden_markov,
    linear_gaussian,
    local_level,
    stochastic_volatility,
    stochastic_volatility_with_leverage,
    stochastic_volatility_with_parameters,
    theta_logistic,
)

__all__ = [
    "Filtered",
    "FilteredStates",
    "HiddenMarkov",
    "LinearGaussian",
    "Series",
    "Smoothed",
    "SmoothedStates",
    "autoregression_model",
    "bearings_only",
    "coupled_model",
    "hidden_markov",
    "hmm_filter",
    "hmm_smoother",
    "kalman_filter",
    "kalman_smoother",
    "linear_gaussian",
    "local_level",
    "local_level_model",
    "log_emissions",
    "nile",
    "sp500_returns",
    "stochastic_volatility",
    "stochastic_volatility_with_leverage",
    "stochastic_volatility_with_parameters",
    "theta_logistic",
]
