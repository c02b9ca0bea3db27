// Products with many rows of types in blocks of 256 weights. They stand apart from the others so that both are compiled at once.
#include "matmul.cuh"

FOR_QUANTIZED_256(MATMULS)
