# The archive's place and sum are put in where it is built; see README.md beside this file.
class MlxLlava < Formula
  include Language::Python::Virtualenv

  desc "Ask LLaVA about pictures, in pure MLX"
  url "@URL@"
  sha256 "@SHA256@"
  license "MIT"

  depends_on arch: :arm64
  depends_on :macos
  depends_on "python@3.13"

  # The libraries in wheels find each other as they stand, and have no room for longer paths.
  preserve_rpath

  def install
    virtualenv_create(libexec, "python3.13")
    system "python3.13", "-m", "pip", "--python=#{libexec}/bin/python", "install", "--no-cache-dir",
           "#{buildpath}[mcp,server]"
    bin.install_symlink libexec/"bin/mlx-llava"
  end

  service do
    run [opt_bin/"mlx-llava", "server", "--alias", "llava"]
    keep_alive crashed: true
    log_path var/"log/mlx-llava.log"
    error_log_path var/"log/mlx-llava.log"
  end

  test do
    assert_equal version.to_s, shell_output("#{bin}/mlx-llava --version").strip
    answer = shell_output("#{bin}/mlx-llava generate --quiet --prompt 'What is it?'")
    refute_empty answer.strip
  end
end
