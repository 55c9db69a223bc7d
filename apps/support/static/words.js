import { speak } from "/shared/page.js";

export const word = speak({
  en: {
    title: "Customer service", send: "Ask", person: "Ask a person", queue: "Hand-offs",
    drafts: "Drafts of articles", unknown: "I do not know. You can ask a person.",
    near: "Perhaps one of these:", source: "From:", asked: "A person has been asked and will answer here.",
    take: "Take", solve: "Solved", reply: "Answer", publish: "Make it an article", drop: "Throw away",
    nobody: "Nobody waits.", words: "Found by words alone: the encoder did not answer in time.",
    name: "Your name", id: "Name of the article",
  },
  zh: {
    title: "客户服务", send: "提问", person: "转人工", queue: "人工队列",
    drafts: "文章草稿", unknown: "我不知道。您可以转人工。",
    near: "也许是这些：", source: "来源：", asked: "已转人工，回复会出现在这里。",
    take: "接手", solve: "已解决", reply: "回复", publish: "存为文章", drop: "丢弃",
    nobody: "没有人在等。", words: "仅按词语查找：编码器没有及时回答。",
    name: "您的名字", id: "文章名称",
  },
});
