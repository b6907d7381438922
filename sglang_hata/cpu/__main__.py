from sglang_hata.cpu.cli import main

main()
