// What MKL asks before it uses AVX-512: mkl.py says why, and who puts this before torch's own.

extern "C" int mkl_serv_intel_cpu_true() { return 1; }
