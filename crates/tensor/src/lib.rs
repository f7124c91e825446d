//! Number types, weight formats and their codecs, host buffers and the thread pool of Moellon.
