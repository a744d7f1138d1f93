"""The probability path from noise to data, and the samplers that follow it; torch alone."""
