"""Lines on the terminal while a run goes on."""

from gemini_gnn.observe.progress import Progress, say


def test_progress_names_the_step_that_was_done_and_a_message_ends_its_line(capsys):
    progress = Progress(True, epochs=2, steps_per_epoch=4, terminal=True)
    progress.every_s = 0.0
    progress.step(1, 0.5)
    assert "epoch 1/2 step 1/4 loss 0.5000" in (first := capsys.readouterr().out) and "left" not in first
    progress.step(4, 0.25)
    assert "epoch 1/2 step 4/4 loss 0.2500" in (out := capsys.readouterr().out) and "left" in out
    say("stopped")
    assert capsys.readouterr() == ("\n", "stopped\n")
    progress.line("epoch 1/2")
    say("done")
    assert capsys.readouterr()[1] == "done\n"
