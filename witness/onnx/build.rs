//! Turns the graph into Rust.

fn main() {
    burn_onnx::ModelGen::new().input("hf-tiny.onnx").out_dir("model/").run_from_script();
}
