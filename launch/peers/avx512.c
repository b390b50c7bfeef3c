/* MKL asks this of a processor before it takes its AVX-512 path, which AMD's run as well. */
int mkl_serv_intel_cpu_true(void) { return 1; }
