//! What all parts of Keelson share.
